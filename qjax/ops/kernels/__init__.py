"""The bodies of matmul: how a matrix is read where it is multiplied.  linear.py says which one runs."""
