"""The operations that the network and its training are made of."""
