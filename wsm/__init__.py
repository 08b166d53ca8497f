"""The weight streaming manager: pages weights SSD -> page-locked CPU memory -> GPU. Knows nothing of attention."""
