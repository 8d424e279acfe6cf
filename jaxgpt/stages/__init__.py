"""The four stages of an assistant, each one value for the same loop."""
