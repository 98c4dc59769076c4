"""Native sparse attention."""
