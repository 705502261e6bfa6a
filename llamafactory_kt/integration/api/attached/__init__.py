"""Pictures, videos and sounds that come with a conversation: where they are, and what is too much."""
