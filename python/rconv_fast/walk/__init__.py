"""The model as a graph of steps, and the recursion over it from the last layer to the first."""
