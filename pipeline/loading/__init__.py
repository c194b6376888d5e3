"""From shards and scores to crops, and to masked, thrown and visible patches."""
