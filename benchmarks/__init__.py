"""weft beside peft and beside the frozen base, interleaved in one process: ratios, not absolute times."""
