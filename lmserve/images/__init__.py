"""Images of chats: from a URL to features in a file."""
