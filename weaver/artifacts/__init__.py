"""Artifacts of stages on disk: tensor files, manifests, results, and the types they hold."""
