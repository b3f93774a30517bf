"""Raw documents to packed stores."""
