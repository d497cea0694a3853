"""What a graph gets right, what it costs, and how sure that is."""
