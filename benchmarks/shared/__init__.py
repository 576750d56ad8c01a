"""What benchmarks share: networks, turns, the two phases, clocks, records with provenance. No benchmark."""
