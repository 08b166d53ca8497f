"""Pages groups SSD -> page-locked CPU memory -> GPU, ahead of the computation."""
