"""The weight streaming manager: pages a model's weights SSD -> page-locked CPU memory -> GPU. Knows nothing of attention."""
