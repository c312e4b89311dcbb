"""Tables of docs/, each made from the runs of a sweep."""
