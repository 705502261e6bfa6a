"""Keys and values of earlier prompts and answers, so that a prompt that begins as one of them computes only what is new."""
