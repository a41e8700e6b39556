"""When an outcome was decided, and by what: answers from thinking that is cut short."""
