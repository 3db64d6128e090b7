"""From the text of a conversation to ids and labels."""
