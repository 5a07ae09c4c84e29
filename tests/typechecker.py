"""Run-time checks of type annotations in tests, see conftest.py."""

from beartype import BeartypeConf, beartype

# An int is accepted where a float is annotated (PEP 484's numeric tower).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
