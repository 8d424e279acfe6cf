"""Problems with numbers for answers, that a reward can verify: text, demonstrations good and bad, and prompts."""
