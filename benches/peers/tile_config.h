// For llama.cpp's AMX kernels under GCC 12: its `_tile_loadconfig` tells the compiler of the first 8 of 64 bytes, so the others
// are written after they have been read, and the processor faults on what was there before. Included before every source.
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

struct whole_tile_config {
    char bytes[64];
};

static inline __attribute__((always_inline)) void load_whole_tile_config(const void *config) {
    __asm__ volatile("ldtilecfg\t%0" : : "m"(*(const struct whole_tile_config *)config));
}

#define _tile_loadconfig load_whole_tile_config
#endif
