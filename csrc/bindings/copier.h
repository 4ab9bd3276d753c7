#pragma once

#include <nanobind/nanobind.h>

namespace dscheck {

void bind_copier(nanobind::module_& module);

}  // namespace dscheck
