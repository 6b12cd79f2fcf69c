"""The constraint matrices of a convolution as torch operations, and products with them without the matrices."""
