"""The processes of a run: ranks, signals to them, their memory. What they compute is elsewhere."""
