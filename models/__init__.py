"""What the two scripts share."""
