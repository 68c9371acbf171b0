"""What a task holds: addresses and sizes, one int64 each, at these places of an array.

Several tasks that are done in one call lie one after another; what is said of all of them (COUNT,
THREADS, PARALLEL, WORK, ROOM, ROOMS, SEAT) is in the first.
"""

from __future__ import annotations

NEXT = 0  # the next row to be taken
ROWS = 1  # of the output
STEP = 2  # rows that a thread takes at once
TOKENS = 3
N = 4  # inputs
X = 5  # activations, 0 where weights are asked for
X_KIND = 6
X_FLOAT = 7  # activations as float32
X_INT = 8  # as 16-bit integers
X_SCALES = 9  # per token and chunk
X_SUMS = 10  # per token and chunk
CHUNK = 11  # inputs summed as integers, 0 for none
N_FLOAT_CHUNKS = 12  # that are multiplied in float32
Y = 13  # outputs
Y_KIND = 14
BIAS = 15  # 0 for none
BIAS_KIND = 16
START = 17  # float32 to add to the outputs, 0 for none
SOURCE = 18  # how rows are stored
BITS = 19  # of a code; of walks: of two weights
CODES = 20  # or 16-bit floats
WIDTH = 21  # bytes of a row of codes; of walks: tiles in a row
SCALES = 22
SCALE_KIND = 23
ZEROS = 24  # 0 where symmetric
GROUPS = 25  # of a row
ALL_ROWS = 26  # of the weight
PLACES = 27  # mask, or numbers of n:m masks; of walks: their starts, 0 where there are none
PLACES_WIDTH = 28  # bytes of a row
TABLE = 29  # masks of n:m by number, 0 for any sparsity; of walks: the values of states
M = 30  # of n:m
NUMBER_BITS = 31  # of a mask's number; of walks: of a state
KEPT = 32  # weights
STARTS = 33  # before which kept weight each row begins
IDS = 34  # rows that are asked for, int64, 0 for all from `first` on
FIRST = 35
THREADS = 36
PARALLEL = 37  # GOMP_parallel
WORK = 38  # what each of its threads calls
ROOM = 39  # bytes of a row of codes in the memory that a thread works in: the longest row's
ROOMS = 40  # that memory, ROOM_SIZE * ROOM of each thread
SEAT = 41  # the next thread's number
COUNT = 42  # tasks of one call
SAME = 43  # the number, from 1, of the task whose activations are this one's too; 0 for none
FLOAT_CHUNKS = 44  # their numbers, token * chunks + chunk, ascending, int32 each
MULTIPLIER = 45  # of states whose values are computed, 16 bits; 0 where they are looked up
SIZE = 46
PLACE = {name.lower(): i for name, i in list(globals().items()) if type(i) is int and i < SIZE}

FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # kinds of numbers
CODED, SPARSE_CODES, SPARSE_FLOATS, FLOATS, WALKS, MMA_WALKS = 0, 1, 2, 3, 4, 5  # sources of a row

# what lies where in a thread's memory, in ROOMs: codes of four rows, mask and kept codes, one byte
# each; float32: weights, kept weights, scales and zero points of groups, factors of chunks (those
# of four rows and two tokens), sums
Q, MASK, KEPT_CODES = 0, 4, 5
W, FLOAT_CODES, SCALE, ZERO, FACTOR, OFFSET, SCALED, SUMS = range(8, 40, 4)
ROOM_SIZE = 40
LEAST_ROOM = 448  # of ROOM: strips.py needs 17 KB of it all
