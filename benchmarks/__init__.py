"""Side-by-side measurements, each a table printed by one command."""
