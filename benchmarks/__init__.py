"""Measurements against EasyEdit's own WISE, PEFT's merge operators and the hardware's limits. See README.md."""
