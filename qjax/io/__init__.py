"""Files: what comes from disk is checked before it is believed, what goes there arrives whole or not."""
