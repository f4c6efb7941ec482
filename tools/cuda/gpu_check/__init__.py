"""What only a GPU can tell, verb by verb: `python -m tools.cuda.gpu_check` says how to ask.

A verb is a list of items: tests, tools of compute-sanitizer, problems to time. They run in processes of their own
(`process`), which tell about each item as it begins and ends (`events`). What has ended is kept in one file for each
verb (`results`), so that the next run goes on with the rest.
"""
