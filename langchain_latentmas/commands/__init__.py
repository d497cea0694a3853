"""One command of `latentmas` per file, and what they share: options, the session with a model, the terminal."""
