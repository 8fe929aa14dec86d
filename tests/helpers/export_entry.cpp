// Makes the functions of an exported header callable from Python, for tests.

#include "negtome.h"

extern "C" {
size_t test_problem_bytes() { return sizeof(negtome_problem); }
const char *test_check(const negtome_problem *problem) { return negtome_check(problem); }
size_t test_workspace_bytes(const negtome_problem *problem) {
    return negtome_workspace_bytes(problem);
}
int test_run(const char *folder, const negtome_problem *problem, CUdeviceptr workspace,
    size_t bytes) {
    negtome_operator op;
    negtome_result result = negtome_load(&op, folder);
    if (result != NEGTOME_SUCCESS) return result;
    result = negtome_launch(&op, problem, workspace, bytes, nullptr);
    negtome_result unloaded = negtome_unload(&op);
    return result != NEGTOME_SUCCESS ? result : unloaded;
}
}
