"""Settings: what they are (schema), where they come from (load), how they are shown (describe)."""
