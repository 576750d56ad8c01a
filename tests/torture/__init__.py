"""What must never lose or change a run: kills, signals, damaged and hostile files, nonsense in recipes."""
