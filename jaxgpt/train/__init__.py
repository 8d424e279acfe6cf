"""The one step and the one loop that every stage runs on."""
