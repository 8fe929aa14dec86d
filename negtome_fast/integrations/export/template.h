/* negtome: loads and launches one operator that was compiled ahead of time. Generated; C99, C++11.
 *
 *     negtome_operator op;                          load once, in a current context
 *     negtome_load(&op, "folder of the kernels");
 *     negtome_problem p = {0};                      sizes, pointers; see below
 *     const char *wrong = negtome_check(&p);        NULL, or the fault in words
 *     size_t bytes = negtome_workspace_bytes(&p);   scratch memory on the device
 *     negtome_launch(&op, &p, workspace, bytes, stream);
 *     negtome_unload(&op);
 *
 *     y_i = x_i + alpha * (x_i - r_j)  where  j = argmax_j cos(x_i, r_j)  and  cos > threshold
 *
 * No function allocates memory on the device or waits for it. Functions are static: include the
 * header of each exported operator in one source file of its own.
 */
#ifndef NEGTOME_H
#define NEGTOME_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* @constants */

#if NEGTOME_HIP
#include <hip/hip_runtime_api.h>
typedef hipError_t negtome_result;
typedef hipModule_t negtome_module;
typedef hipFunction_t negtome_function;
typedef hipStream_t negtome_stream;
typedef hipDeviceptr_t negtome_pointer;
#define NEGTOME_SUCCESS hipSuccess
#define NEGTOME_INVALID hipErrorInvalidValue
#define NEGTOME_NO_FILE hipErrorFileNotFound
#define NEGTOME_NO_MEMORY hipErrorOutOfMemory
#define NEGTOME_DRIVER(name) hip##name
#define NEGTOME_LAUNCH hipModuleLaunchKernel
#else
#include <cuda.h>
typedef CUresult negtome_result;
typedef CUmodule negtome_module;
typedef CUfunction negtome_function;
typedef CUstream negtome_stream;
typedef CUdeviceptr negtome_pointer;
#define NEGTOME_SUCCESS CUDA_SUCCESS
#define NEGTOME_INVALID CUDA_ERROR_INVALID_VALUE
#define NEGTOME_NO_FILE CUDA_ERROR_FILE_NOT_FOUND
#define NEGTOME_NO_MEMORY CUDA_ERROR_OUT_OF_MEMORY
#define NEGTOME_DRIVER(name) cu##name
#define NEGTOME_LAUNCH cuLaunchKernel
#endif

/* A problem on the device. A field that is zero means: contiguous, one, or not wanted.
 *
 * B items of N tokens of D channels of NEGTOME_DTYPE, in G groups that never see each other.
 * Channels have unit stride; other strides are numbers of elements.
 */
typedef struct negtome_problem {
    int32_t items;    /* B */
    int32_t tokens;   /* N */
    int32_t channels; /* D, a multiple of NEGTOME_DIVISOR */
    int32_t groups;   /* G, divides B */

    negtome_pointer x; /* (B, N, D) */
    int64_t x_item_stride, x_token_stride;
    negtome_pointer out; /* (B, N, D), or x with its strides if NEGTOME_INPLACE */
    int64_t out_item_stride, out_token_stride;

    /* With NEGTOME_EXTERNAL: (R, M, D), or (B * R, M, D) if per_item, a set for each item. */
    negtome_pointer reference;
    int64_t reference_item_stride, reference_token_stride;
    int32_t references;       /* R */
    int32_t reference_tokens; /* M */
    int32_t per_item;

    /* fp32 on the device: one value, or one for each reference that an item sees. */
    negtome_pointer alpha, threshold;
    int32_t alphas, thresholds;

    /* Contiguous bytes, 0 or 1; with NEGTOME_REFERENCE_MASK and NEGTOME_SOURCE_MASK. */
    negtome_pointer reference_mask; /* (B, N), or (R or B * R, M): may be matched */
    negtome_pointer source_mask;    /* (B, N): may move */

    /* Results, contiguous; S is 1, or with NEGTOME_SUM the references that an item sees. */
    negtome_pointer similarity; /* (B, S, N) fp32, -inf: no match */
    negtome_pointer pushed;     /* (B, S, N) int64, slot * M + token, -1: not pushed */
} negtome_problem;

typedef struct negtome_operator {
    negtome_module modules[NEGTOME_KERNEL_COUNT];
    negtome_function functions[NEGTOME_KERNEL_COUNT];
    int multiprocessors;
} negtome_operator;

/* ------------------------------------------------------------------------------------------
 * Loading
 * ---------------------------------------------------------------------------------------- */
static inline negtome_result negtome_unload(negtome_operator *op) {
    negtome_result result = NEGTOME_SUCCESS;
    for (int i = 0; i < NEGTOME_KERNEL_COUNT; ++i) {
        if (op->modules[i]) {
            negtome_result status = NEGTOME_DRIVER(ModuleUnload)(op->modules[i]);
            if (result == NEGTOME_SUCCESS) result = status;
            op->modules[i] = NULL;
        }
    }
    return result;
}

/* Load kernels from memory: images[i] is the content of the file negtome_kernels[i].file. */
static inline negtome_result negtome_load_images(
    negtome_operator *op, const void *const images[NEGTOME_KERNEL_COUNT]) {
    negtome_result result;
    for (int i = 0; i < NEGTOME_KERNEL_COUNT; ++i) op->modules[i] = NULL;
#if NEGTOME_HIP
    int device = 0;
    result = hipGetDevice(&device);
    if (result == hipSuccess)
        result = hipDeviceGetAttribute(
            &op->multiprocessors, hipDeviceAttributeMultiprocessorCount, device);
#else
    CUdevice device = 0;
    result = cuCtxGetDevice(&device);
    if (result == CUDA_SUCCESS)
        result = cuDeviceGetAttribute(
            &op->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device);
#endif
    for (int i = 0; result == NEGTOME_SUCCESS && i < NEGTOME_KERNEL_COUNT; ++i) {
        result = NEGTOME_DRIVER(ModuleLoadData)(&op->modules[i], images[i]);
        if (result == NEGTOME_SUCCESS)
            result = NEGTOME_DRIVER(ModuleGetFunction)(
                &op->functions[i], op->modules[i], negtome_kernels[i].symbol);
#if !NEGTOME_HIP
        /* A kernel may use more than 48 KiB only after this call. */
        if (result == CUDA_SUCCESS && negtome_kernels[i].shared > 48 * 1024)
            result = cuFuncSetAttribute(op->functions[i],
                CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)negtome_kernels[i].shared);
#endif
    }
    if (result != NEGTOME_SUCCESS) (void)negtome_unload(op);
    return result;
}

static inline void *negtome_read(const char *folder, const char *file) {
    char path[4096];
    int length = snprintf(path, sizeof path, "%s/%s", folder, file);
    FILE *stream;
    void *content = NULL;
    long size;
    if (length < 0 || (size_t)length >= sizeof path) return NULL;
    stream = fopen(path, "rb");
    if (!stream) return NULL;
    if (fseek(stream, 0, SEEK_END) == 0 && (size = ftell(stream)) > 0 &&
        fseek(stream, 0, SEEK_SET) == 0 && (content = malloc((size_t)size)) != NULL &&
        fread(content, 1, (size_t)size, stream) != (size_t)size) {
        free(content);
        content = NULL;
    }
    fclose(stream);
    return content;
}

/* Load the kernels of an exported folder into the current context. */
static inline negtome_result negtome_load(negtome_operator *op, const char *folder) {
    void *images[NEGTOME_KERNEL_COUNT];
    const void *views[NEGTOME_KERNEL_COUNT];
    negtome_result result = NEGTOME_SUCCESS;
    int count = 0;
    for (int i = 0; i < NEGTOME_KERNEL_COUNT; ++i) op->modules[i] = NULL;
    for (; count < NEGTOME_KERNEL_COUNT; ++count) {
        images[count] = negtome_read(folder, negtome_kernels[count].file);
        views[count] = images[count];
        if (!images[count]) {
            result = NEGTOME_NO_FILE;
            break;
        }
    }
    if (result == NEGTOME_SUCCESS) result = negtome_load_images(op, views);
    while (count-- > 0) free(images[count]);
    return result;
}

/* ------------------------------------------------------------------------------------------
 * Sizes that follow from a problem
 * ---------------------------------------------------------------------------------------- */
typedef struct negtome_sizes {
    int32_t items, tokens, channels, group_size;
    int32_t slots;           /* references that an item sees */
    int32_t columns;         /* M */
    int32_t reference_items; /* P */
    int32_t reference_step;
    int32_t rows;     /* S: rows of similarity and pushed */
    int64_t products; /* pairs of a source and a reference item; with NEGTOME_OTHERS, of items */
    int32_t xb, xn, rb, rm, ob, on;
} negtome_sizes;

static inline int64_t negtome_ceil(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Number of scales of `tokens` tokens, rounded up to whole blocks. */
static inline int64_t negtome_scale_room(int64_t tokens) {
    return negtome_ceil(tokens, NEGTOME_SCALE_ROOM) * NEGTOME_SCALE_ROOM;
}

/* Code of a divisor d in [1, 2^31): kernels compute n / d as (n * m) >> (31 + ceil(log2 d)). */
static inline int64_t negtome_reciprocal(int64_t divisor) {
    int shift = 31;
    while (((int64_t)1 << (shift - 31)) < divisor) shift++;
    return negtome_ceil((int64_t)1 << shift, divisor) << 6 | shift;
}

static inline int32_t negtome_stride(int64_t given, int64_t contiguous) {
    return (int32_t)(given ? given : contiguous);
}

static inline negtome_sizes negtome_sizes_of(const negtome_problem *p) {
    negtome_sizes s;
    int32_t groups = p->groups ? p->groups : 1;
    int64_t token = p->channels;
    s.items = p->items;
    s.tokens = p->tokens;
    s.channels = p->channels;
    s.group_size = p->items / groups;
#if NEGTOME_EXTERNAL
    s.slots = p->references ? p->references : 1;
    s.columns = p->reference_tokens;
    s.reference_items = p->per_item ? p->items * s.slots : s.slots;
    s.reference_step = p->per_item ? s.slots : 0;
    s.products = (int64_t)p->items * s.slots;
#else
    s.slots = NEGTOME_OTHERS ? s.group_size - 1 : 1;
    s.columns = p->tokens;
    s.reference_items = p->items;
    s.reference_step = 0;
    s.products = NEGTOME_OTHERS ? (int64_t)groups * s.group_size * (s.group_size - 1) / 2
                                : p->items - groups;
#endif
    s.rows = NEGTOME_SUM ? s.slots : 1;
    s.xn = negtome_stride(p->x_token_stride, token);
    s.xb = negtome_stride(p->x_item_stride, (int64_t)s.tokens * s.xn);
#if NEGTOME_INPLACE
    s.on = s.xn;
    s.ob = s.xb;
#else
    s.on = negtome_stride(p->out_token_stride, token);
    s.ob = negtome_stride(p->out_item_stride, (int64_t)s.tokens * s.on);
#endif
#if NEGTOME_EXTERNAL
    s.rm = negtome_stride(p->reference_token_stride, token);
    s.rb = negtome_stride(p->reference_item_stride, (int64_t)s.columns * s.rm);
#else
    s.rm = s.xn;
    s.rb = s.xb;
#endif
    return s;
}

static inline int negtome_aligned(negtome_pointer pointer) { return (uintptr_t)pointer % 16 == 0; }

static inline int negtome_bad_stride(int64_t given, int64_t contiguous) {
    int64_t stride = given ? given : contiguous;
    return stride < 0 || stride > INT32_MAX || stride % NEGTOME_DIVISOR != 0;
}

/* NULL, or the fault of the problem in words. Reads no memory of the device. */
static inline const char *negtome_check(const negtome_problem *p) {
    int32_t groups = p->groups ? p->groups : 1;
    negtome_sizes s;
    if (p->items < 1 || p->tokens < 1 || p->channels < 1)
        return "items, tokens and channels must be positive";
    if (p->channels % NEGTOME_DIVISOR)
        return "channels must be a multiple of NEGTOME_DIVISOR in these kernels";
    if (groups < 1 || p->items % groups) return "groups must divide items";
    if (!p->x || !p->out || !p->alpha || !p->threshold)
        return "x, out, alpha and threshold are needed";
#if NEGTOME_EXTERNAL
    if (!p->reference || p->reference_tokens < 1 || p->references < 0)
        return "a reference with reference_tokens is needed";
#else
    if (p->reference || p->references || p->reference_tokens || p->per_item)
        return "these kernels take references from the batch";
#endif
#if NEGTOME_OTHERS
    if (p->items / groups < 2) return "reference \"others\" needs 2 items in a group";
#endif
    if (!negtome_aligned(p->x) || !negtome_aligned(p->out) || !negtome_aligned(p->reference) ||
        !negtome_aligned(p->alpha) || !negtome_aligned(p->threshold) ||
        !negtome_aligned(p->reference_mask) || !negtome_aligned(p->source_mask) ||
        !negtome_aligned(p->similarity) || !negtome_aligned(p->pushed))
        return "all pointers must be aligned to 16 bytes";
#if NEGTOME_INPLACE
    if (p->out != p->x) return "these kernels work in place: out must be x";
    if ((p->out_item_stride && p->out_item_stride != p->x_item_stride) ||
        (p->out_token_stride && p->out_token_stride != p->x_token_stride))
        return "these kernels work in place: the strides of out must be those of x, or 0";
#elif NEGTOME_OTHERS
    if (p->out == p->x) return "out must not be x, whose tokens serve as references";
#endif
#if NEGTOME_EXTERNAL
    if (p->out == p->reference) return "out must not be the reference";
#endif
#if !NEGTOME_REFERENCE_MASK
    if (p->reference_mask) return "these kernels were exported without a reference mask";
#else
    if (!p->reference_mask) return "these kernels need a reference mask";
#endif
#if !NEGTOME_SOURCE_MASK
    if (p->source_mask) return "these kernels were exported without a source mask";
#else
    if (!p->source_mask) return "these kernels need a source mask";
#endif
    s = negtome_sizes_of(p);
    if ((p->alphas > 1 && p->alphas != s.slots) || (p->thresholds > 1 && p->thresholds != s.slots))
        return "alpha and threshold need one value, or one for each reference";
#if NEGTOME_OFFICIAL
    if (s.columns != s.tokens) return "official matching needs as many reference tokens as tokens";
#endif
    if (negtome_bad_stride(p->x_token_stride, p->channels) ||
        negtome_bad_stride(p->x_item_stride, (int64_t)s.tokens * s.xn) ||
        negtome_bad_stride(p->out_token_stride, p->channels) ||
        negtome_bad_stride(p->out_item_stride, (int64_t)s.tokens * s.on) ||
        negtome_bad_stride(p->reference_token_stride, p->channels) ||
        negtome_bad_stride(p->reference_item_stride, (int64_t)s.columns * s.rm))
        return "strides must be multiples of NEGTOME_DIVISOR below 2^31";
#if NEGTOME_TILES
    if ((int64_t)s.slots * s.columns > INT32_MAX) return "too many reference tokens for one key";
    if (s.products * negtome_ceil(s.tokens, NEGTOME_TILES_BLOCK_M) *
            negtome_ceil(s.columns, NEGTOME_TILES_BLOCK_N) > INT32_MAX)
        return "too many tiles";
    if ((int64_t)s.items * s.slots * s.tokens > INT32_MAX) return "too many tokens";
#endif
    return NULL;
}

/* Offsets of scratch memory in the workspace, in bytes. */
typedef struct negtome_layout {
    size_t scale, source_scale, keys, similarity, index, row_similarity, row_pushed, bytes;
} negtome_layout;

static inline size_t negtome_take(size_t *bytes, int64_t elements, size_t size) {
    size_t start = *bytes;
    *bytes += ((size_t)elements * size + 255) / 256 * 256;
    return start;
}

static inline negtome_layout negtome_layout_of(const negtome_problem *p, const negtome_sizes *s) {
    negtome_layout l = {0, 0, 0, 0, 0, 0, 0, 0};
    int64_t all = (int64_t)s->items * s->slots * s->tokens;
    int64_t rows = (int64_t)s->items * s->rows * s->tokens;
    l.scale = negtome_take(&l.bytes, s->reference_items * negtome_scale_room(s->columns), 4);
#if NEGTOME_OFFICIAL
    l.source_scale = negtome_take(&l.bytes, s->items * negtome_scale_room(s->tokens), 4);
#endif
#if NEGTOME_TILES
    l.keys = negtome_take(&l.bytes, NEGTOME_RESOLVE ? all : rows, 8);
#endif
#if NEGTOME_RESOLVE
    if (!NEGTOME_SUM || !p->similarity) l.similarity = negtome_take(&l.bytes, all, 4);
    l.index = negtome_take(&l.bytes, all, 8);
#else
    (void)all;
#endif
    if (!p->similarity) l.row_similarity = negtome_take(&l.bytes, rows, 4);
    if (!p->pushed) l.row_pushed = negtome_take(&l.bytes, rows, 8);
    return l;
}

/* Bytes of scratch memory on the device; 0 for a problem that negtome_check refuses. */
static inline size_t negtome_workspace_bytes(const negtome_problem *p) {
    negtome_sizes s;
    if (negtome_check(p)) return 0;
    s = negtome_sizes_of(p);
    return negtome_layout_of(p, &s).bytes;
}

/* ------------------------------------------------------------------------------------------
 * Launching
 * ---------------------------------------------------------------------------------------- */
static inline negtome_pointer negtome_at(negtome_pointer workspace, size_t offset) {
    return (negtome_pointer)((uintptr_t)workspace + offset);
}

static inline negtome_result negtome_launch_kernel(const negtome_operator *op, int kernel,
    int64_t grid_x, int64_t grid_y, negtome_stream stream, void **arguments) {
    if (grid_x < 1 || grid_y < 1) return NEGTOME_SUCCESS;
    if (grid_x > INT32_MAX || grid_y > 65535) return NEGTOME_INVALID;
    return NEGTOME_LAUNCH(op->functions[kernel], (unsigned)grid_x, (unsigned)grid_y, 1,
        negtome_kernels[kernel].block, 1, 1, negtome_kernels[kernel].shared, stream, arguments,
        NULL);
}

/* @wrappers */

/* Launch the operator. The workspace, aligned to 16 bytes, must live until the stream is done. */
static inline negtome_result negtome_launch(const negtome_operator *op, const negtome_problem *p,
    negtome_pointer workspace, size_t workspace_bytes, negtome_stream stream) {
    negtome_sizes s;
    negtome_layout l;
    negtome_result result;
    negtome_pointer reference, scale, keys, similarity, pushed;
    int32_t item_step, alpha_stride, threshold_stride, mask_stride, source_mask_stride, key_count;
    if (negtome_check(p)) return NEGTOME_INVALID;
    s = negtome_sizes_of(p);
    l = negtome_layout_of(p, &s);
    if (workspace_bytes < l.bytes) return NEGTOME_NO_MEMORY;
    if (!negtome_aligned(workspace)) return NEGTOME_INVALID;
    reference = NEGTOME_EXTERNAL ? p->reference : p->x;
    scale = negtome_at(workspace, l.scale);
    keys = NEGTOME_TILES ? negtome_at(workspace, l.keys) : (negtome_pointer)0;
    similarity = p->similarity ? p->similarity : negtome_at(workspace, l.row_similarity);
    pushed = p->pushed ? p->pushed : negtome_at(workspace, l.row_pushed);
    item_step = NEGTOME_FIRST ? s.group_size : 1;
    alpha_stride = p->alphas > 1;
    threshold_stride = p->thresholds > 1;
    mask_stride = p->reference_mask ? s.columns : 0;
    source_mask_stride = p->source_mask ? s.tokens : 0;
    key_count = NEGTOME_TILES ? s.items * (NEGTOME_RESOLVE ? s.slots : s.rows) * s.tokens : 0;

    /* Scales of the reference; the same launch empties the keys. */
    result = negtome_launch_scale(op,
        negtome_ceil(negtome_scale_room(s.columns), NEGTOME_SCALE_BLOCK_M),
        negtome_ceil(s.reference_items, item_step), stream, reference, p->reference_mask, scale,
        keys, s.columns, s.channels, item_step, key_count, s.rb, s.rm, mask_stride,
        mask_stride != 0);
    if (result != NEGTOME_SUCCESS) return result;

#if NEGTOME_ROWS
    /* Matching and push in one launch. */
    return negtome_launch_rows(op, negtome_ceil(s.tokens, NEGTOME_ROWS_BLOCK_M), s.items, stream,
        p->x, reference, scale, p->alpha, p->threshold, p->source_mask, p->out, similarity, pushed,
        s.tokens, s.columns, s.channels, s.slots, s.group_size, s.reference_step, s.xb, s.xn, s.rb,
        s.rm, s.ob, s.on, alpha_stride, threshold_stride, source_mask_stride, source_mask_stride != 0);
#else
    negtome_pointer column_scale = scale;
    int64_t row_blocks = negtome_ceil(s.tokens, NEGTOME_TILES_BLOCK_M);
    int64_t column_blocks = negtome_ceil(s.columns, NEGTOME_TILES_BLOCK_N);
    int64_t tiles = s.products * row_blocks * column_blocks;
    int64_t tail = row_blocks % NEGTOME_TILES_GROUP;
    int64_t tile_code, band_code, tail_code, product_code, circle_code;
    int64_t programs = (int64_t)op->multiprocessors * NEGTOME_TILES_RESIDENT;
    if (programs > tiles) programs = tiles;
    tile_code = negtome_reciprocal(row_blocks * column_blocks);
    band_code = negtome_reciprocal(NEGTOME_TILES_GROUP * column_blocks);
    tail_code = negtome_reciprocal(tail ? tail : 1);
#if NEGTOME_FIRST
    product_code = negtome_reciprocal(s.group_size > 1 ? s.group_size - 1 : 1);
#elif NEGTOME_OTHERS
    product_code = negtome_reciprocal(
        s.group_size > 1 ? (int64_t)s.group_size * (s.group_size - 1) / 2 : 1);
#else
    product_code = negtome_reciprocal(s.slots);
#endif
    circle_code = negtome_reciprocal(s.group_size);
#if NEGTOME_OFFICIAL
    /* Source and reference are exchanged: the columns are source tokens. */
    column_scale = negtome_at(workspace, l.source_scale);
    result = negtome_launch_source_scale(op,
        negtome_ceil(negtome_scale_room(s.tokens), NEGTOME_SCALE_BLOCK_M),
        s.items, stream, p->x, (negtome_pointer)0, column_scale, (negtome_pointer)0, s.tokens,
        s.channels, 1, 0, s.xb, s.xn, 0, 0);
    if (result != NEGTOME_SUCCESS) return result;
    result = negtome_launch_tiles(op, programs, 1, stream, reference, p->x, column_scale, keys,
        s.tokens, s.columns, s.channels, s.slots, 0, (int32_t)s.products, s.group_size,
        s.reference_step, tile_code, band_code, tail_code, product_code, circle_code, s.rb, s.rm,
        s.xb, s.xn);
#else
    result = negtome_launch_tiles(op, programs, 1, stream, p->x, reference, column_scale, keys,
        s.tokens, s.columns, s.channels, s.slots, 0, (int32_t)s.products, s.group_size,
        s.reference_step, tile_code, band_code, tail_code, product_code, circle_code, s.xb, s.xn,
        s.rb, s.rm);
#endif
    if (result != NEGTOME_SUCCESS) return result;

#if NEGTOME_RESOLVE
    {
        negtome_pointer match = NEGTOME_SUM ? similarity : negtome_at(workspace, l.similarity);
        negtome_pointer index = negtome_at(workspace, l.index);
        result = negtome_launch_resolve(op, negtome_ceil(s.tokens, NEGTOME_RESOLVE_BLOCK_M),
            s.items, stream, p->x, reference, column_scale, scale, keys, match, index, s.tokens,
            s.columns, s.channels, s.slots, s.group_size, s.reference_step, s.xb, s.xn, s.rb,
            s.rm);
        if (result != NEGTOME_SUCCESS) return result;
        return negtome_launch_push(op, negtome_ceil(s.tokens, NEGTOME_PUSH_BLOCK_M), s.items,
            stream, p->x, reference, match, index, p->alpha, p->threshold, p->source_mask, p->out,
            similarity, pushed, s.tokens, s.columns, s.channels, s.slots, s.group_size,
            s.reference_step, s.xb, s.xn, s.rb, s.rm, s.ob, s.on, alpha_stride, threshold_stride,
            source_mask_stride, source_mask_stride != 0);
    }
#else
    return negtome_launch_finish(op, negtome_ceil(s.tokens, NEGTOME_FINISH_BLOCK_M), s.items,
        stream, p->x, reference, scale, keys, p->alpha, p->threshold, p->source_mask, p->out,
        similarity, pushed, s.tokens, s.columns, s.channels, s.slots, s.group_size,
        s.reference_step, 0, s.xb, s.xn, s.rb, s.rm, s.ob, s.on, alpha_stride, threshold_stride,
        source_mask_stride, source_mask_stride != 0);
#endif
#endif
}

#endif
