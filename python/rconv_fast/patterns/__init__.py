"""Which linear piece every value of every piecewise layer is on, and how it is found where it is hidden."""
