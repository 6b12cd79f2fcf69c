"""What a person sees of an inversion: pictures, files, progress."""
