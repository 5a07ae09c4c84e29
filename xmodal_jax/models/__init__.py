"""Systems, and the towers and layers that they are built from."""
