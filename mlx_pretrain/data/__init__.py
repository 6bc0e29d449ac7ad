"""From stored tokens to batches on the devices."""
