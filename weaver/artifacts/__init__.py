"""What stages leave on disk: tensor files, manifests, and the types they hold."""
