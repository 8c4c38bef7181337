"""What is done to whole stores: compacted, merged, checked and repaired, quantised, exported."""
