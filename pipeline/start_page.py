def write_start_page(*a): return "x"
