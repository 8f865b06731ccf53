"""What you run: one module a command, and the Beam wiring they share."""
