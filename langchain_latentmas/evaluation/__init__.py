"""What a graph's answers are worth: tasks, graders, a sandbox for code, and runs that can be resumed."""
