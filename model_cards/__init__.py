"""The model cards' template and what is known of published checkpoints. A package, so that editable installs find it."""
