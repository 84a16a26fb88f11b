"""Files in and out: what comes from disk is checked before it is believed, what goes there arrives whole or not at all."""
