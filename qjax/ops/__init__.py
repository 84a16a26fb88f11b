"""What a transformer is made of: pure functions of arrays, one concept a file."""
