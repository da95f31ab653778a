"""What finds objects, colours and text in pictures."""
