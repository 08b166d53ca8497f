"""What a run will hold where, how much memory it takes, how long a pass will be, and which flag would change it."""
