"""How fast it is on the machine at hand, beside what the machine's memory allows and what transformers does."""
