"""Bad input of every kind, seeded: python -m tests.fuzz --cases 5000 --seed 7, or tests/fuzz/test_fuzz.py."""
